"""The built-in engine's C++ kernels for CPUs: compiled when the package is built, chosen by CPU features when loaded."""
