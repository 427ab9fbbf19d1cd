"""How a person sees what the commands found."""
