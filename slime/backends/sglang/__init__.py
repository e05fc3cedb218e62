"""SGLang: the command lines of its servers and of sglang-router, their HTTP protocol, and its weight digests."""
