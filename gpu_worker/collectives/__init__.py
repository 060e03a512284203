"""How the ranks of a tensor-parallel group exchange what they compute."""
