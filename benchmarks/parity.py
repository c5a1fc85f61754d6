"""How far gemlet and transformers are apart in float32: `python -m benchmarks.parity` prints a line a shape.

Random weights, the norms' too, and 50 tokens, more than twice every window; `tests/parity` asserts the bounds.
"""

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemlet.testing import tiny_config, tiny_model
from tests.parity.test_transformers import LENGTH, SHAPES


def main() -> None:
    for name, shape in SHAPES.items():
        config = tiny_config(**shape)
        ours = tiny_model(**shape)
        theirs = Gemma3ForCausalLM(Gemma3TextConfig(**config.to_hf()))
        theirs.load_state_dict(ours.state_dict(), strict=False)  # a tied head is not among ours
        ids = torch.randint(0, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        a, b = ours(ids), theirs(input_ids=ids).logits
        a.logsumexp(-1).sum().backward()
        b.logsumexp(-1).sum().backward()
        gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        relative = [
            float((p.grad - gradients[n]).norm() / gradients[n].norm())
            for n, p in ours.named_parameters()
            if p.grad is not None
        ]
        print(f"{name:<36} logits {float((a - b).detach().abs().max()):.1e}   gradients {max(relative):.1e} relative")


if __name__ == "__main__":
    main()
