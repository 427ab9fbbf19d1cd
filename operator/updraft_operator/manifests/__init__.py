"""Pure functions from a speculator's spec to the manifests of its objects."""
