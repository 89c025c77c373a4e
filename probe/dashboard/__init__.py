"""The dashboard looks at recordings, in a browser. It never imports torch."""
