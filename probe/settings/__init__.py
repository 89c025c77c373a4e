"""What is asked: experiments, their fields, and how they are read. Without torch."""
