"""`kernels benchmark` of this package: SD 1.5's largest cross-attention, of two prompts with guidance."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class SemanticAttention(Benchmark):
    seed = 0

    def setup(self) -> None:
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        self.query = torch.randn(4, 8, 4096, 40, dtype=dtype, device=self.device)
        self.key, self.value = torch.randn(2, 4, 8, 77, 40, dtype=dtype, device=self.device)
        self.program = self.kernel.Program(dropout=self.kernel.SalienceDropout(0.2), renormalize="content")

    def benchmark_plain(self) -> None:
        self.out = self.kernel.semantic_attention(self.query, self.key, self.value)

    def verify_plain(self) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.query, self.key, self.value)

    def benchmark_dropout(self) -> None:
        self.out = self.kernel.semantic_attention(self.query, self.key, self.value, self.program)

    def verify_dropout(self) -> torch.Tensor:
        return self.kernel.semantic_attention(self.query, self.key, self.value, self.program, backend="reference")
