import resource
import sys

import pytest
import torch

from mmformer.training.memory import keep_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc can be told on Linux only")
def test_a_tensor_that_comes_again_faults_no_new_pages():
    if not keep_freed_memory():
        pytest.skip("the C library has no mallopt")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 1000  # 1024 pages each time, if they were given back
