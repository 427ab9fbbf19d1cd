"""What agents make of the messages of the plugin, whichever server it is in."""
