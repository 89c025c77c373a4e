"""What a recording is asked to be: experiments, noisings, their fields, and how they are read."""
