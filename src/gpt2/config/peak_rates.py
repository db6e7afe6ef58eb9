"""The rate of matrix products of GPUs, as their makers give it. Pure."""

# FLOP/s with bfloat16 (V100, T4: float16) and float32 sums, without sparsity, for which makers give
# twice the figure. By the name that the driver gives, without "NVIDIA " in front.
PEAK_FLOPS = {
    # NVIDIA H100 Tensor Core GPU datasheet: 1,979, 1,513 and 1,671 with sparsity
    "H100 80GB HBM3": 989e12,  # SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    # NVIDIA GH200 Grace Hopper Superchip datasheet: 1,979 with sparsity
    "GH200 480GB": 989e12,
    "GH200 144G HBM3e": 989e12,
    # NVIDIA H200 Tensor Core GPU datasheet: 1,979 and 1,671 with sparsity
    "H200": 989e12,
    "H200 NVL": 835e12,
    # NVIDIA HGX H20 product brief
    "H20": 148e12,
    # NVIDIA HGX B200 datasheet: 36 PFLOPS of eight GPUs with sparsity
    "B200": 2250e12,
    # NVIDIA GB200 NVL72 datasheet: 360 PFLOPS of 72 GPUs with sparsity
    "GB200": 2500e12,
    # NVIDIA A100 Tensor Core GPU datasheet
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    # NVIDIA A30, A40 and A10 datasheets
    "A30": 165e12,
    "A40": 149.7e12,
    "A10": 125e12,
    # NVIDIA L4, L40 and L40S datasheets: 242, 362.1 and 733 with sparsity
    "L4": 121e12,
    "L40": 181.05e12,
    "L40S": 362.05e12,
    # NVIDIA T4 and V100 datasheets
    "Tesla T4": 65e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla V100-PCIE-32GB": 112e12,
    "Tesla V100S-PCIE-32GB": 130e12,
    # NVIDIA Ampere GA102 GPU Architecture whitepaper, version 2
    "RTX A6000": 154.8e12,
    "GeForce RTX 3090": 71e12,
    "GeForce RTX 3080": 59.5e12,
    "GeForce RTX 3070": 40.6e12,
    # NVIDIA Ada GPU Architecture whitepaper, version 2
    "RTX 6000 Ada Generation": 364.2e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 4080": 97.5e12,
    "GeForce RTX 4070 Ti": 80.2e12,
    # NVIDIA RTX Blackwell GPU Architecture whitepaper, version 1.1
    "GeForce RTX 5090": 209.5e12,
    "GeForce RTX 5080": 112.6e12,
    "GeForce RTX 5070 Ti": 87.9e12,
    "GeForce RTX 5070": 61.7e12,
    # AMD Instinct MI300X data sheet
    "AMD Instinct MI300X": 1307.4e12,
    "AMD Instinct MI300X OAM": 1307.4e12,
}


def of(device_name: str) -> float | None:
    """FLOP/s of a GPU by the name that torch gives; None if it is not listed.

    The whole name counts: `NVIDIA A100-SXM4-40GB MIG 1g.5gb` is a part of one, and
    `NVIDIA GeForce RTX 4090 Laptop GPU` is another chip.
    """
    return PEAK_FLOPS.get(device_name.removeprefix("NVIDIA "))
