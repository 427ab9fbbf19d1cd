"""What agents do for any server with the plugin: they prepare its folders, and read its messages."""
