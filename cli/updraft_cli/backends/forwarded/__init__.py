"""A cluster whose registries are read too, through port-forwards: what the console needs and no resource holds."""
