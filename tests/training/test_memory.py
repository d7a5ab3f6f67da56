import resource
import sys

import pytest
import torch

from mmformer.training.memory import keep_freed_memory, ran_out


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


def test_memory_that_ran_out_is_said_with_the_peak_and_what_to_do():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")):
        said = ran_out(error)
        assert said is not None
        assert "out of memory" in said
        assert "GB" in said
        for remedy in ("data.loader.batch_size", "trainer.precision=bf16-mixed", "make the model smaller"):
            assert remedy in said
    assert ran_out(RuntimeError("shapes do not fit")) is None
    assert ran_out(ValueError()) is None
