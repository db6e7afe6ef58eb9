"""The messages are those of torch, NCCL, Triton, cuBLAS, cuDNN and the system, word for word."""

import pytest
import torch

from gpt2.base.errors import UserError, is_out_of_memory

CUDA_IS_FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.65 GiB"
)
NCCL_IS_FULL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled \
cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 2 'out of memory'"""


@pytest.mark.parametrize(
    "error",
    [
        CUDA_IS_FULL,
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
        torch.distributed.DistBackendError(NCCL_IS_FULL),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
        MemoryError(),
    ],
)
def test_out_of_memory_in_the_words_of_each_library(error: Exception):
    assert is_out_of_memory(error)


def test_out_of_memory_in_the_words_of_the_compiler():
    from torch._dynamo.exc import BackendCompilerFailed  # seconds to import
    from torch._inductor.exc import InductorError

    triton = RuntimeError("Triton Error [CUDA]: out of memory")
    assert is_out_of_memory(BackendCompilerFailed(lambda: None, triton, None))
    assert is_out_of_memory(InductorError(CUDA_IS_FULL, None))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.distributed.DistBackendError("ncclSystemError: System call (e.g. socket, malloc)"),
        RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 101376"),
        UserError("the job before this one ran out of memory"),  # it has said what to do
    ],
)
def test_other_errors_are_not(error: Exception):
    assert not is_out_of_memory(error)
