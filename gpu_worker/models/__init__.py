"""The models: configuration, weights and tokenizers read from files, and the decoder itself."""
