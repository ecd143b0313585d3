"""Cases of benchmarks, and the figures that are measured of them."""
