"""The tests' tensors are tiny: one thread each is fastest, here and in the processes that tests start."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch is imported
