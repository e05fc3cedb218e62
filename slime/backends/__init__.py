"""The programs slime drives: Megatron-core trains, SGLang or the embedded engine generates."""
