"""Where traces wait for the trainer: who may reach them there, and moves to another Redis."""
