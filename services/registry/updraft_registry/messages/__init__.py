"""Protobuf messages to domain objects and back, checked on the way in."""
