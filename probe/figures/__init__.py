"""Pictures for people: labelled arrays in, figures out. Without torch."""
