"""What runs beside any engine: capture, fleet, swap."""
