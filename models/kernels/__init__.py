"""The operations that decide the speed: `reference` is the truth in torch, `cpu` the same in C, for processors."""
