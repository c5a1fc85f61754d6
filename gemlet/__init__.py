"""gemlet: build, train and run a Gemma-3-class small language model."""
