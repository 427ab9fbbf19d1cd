"""The two kinds of `updraft.dev/v1alpha1` as models, from which the CRDs and the API reference are generated."""
