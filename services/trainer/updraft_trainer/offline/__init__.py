"""Trains a draft from recorded traces in folders, without a registry or a stream."""
