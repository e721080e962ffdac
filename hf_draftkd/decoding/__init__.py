"""How a text is decoded: the setting, its processors, and speculative decoding itself."""
