"""Steps that all tensor-parallel ranks of a server take together: they agree before one of them does anything."""
