"""Pure builders: a speculator's spec in, manifests of its objects out."""
