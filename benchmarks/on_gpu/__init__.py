"""What `benchmarks/on_gpu.sh` runs on a GPU: checks, times and profiles, first what is most worth knowing."""
