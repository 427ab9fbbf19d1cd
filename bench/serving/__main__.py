"""`python -m bench.serving`. OpenMP is configured before torch is loaded, as in a pod."""

import os

from updraft_inference.torch_engine.openmp import wait_briefly

if __name__ == "__main__":
    wait_briefly(os.environ)
    from bench.serving.serving import main

    main()
