"""Rules of the flags that are passed on to SGLang's servers and the router: none says what the run decides itself."""

from slime.config.batches import longest_response
from slime.config.config import Config
from slime.config.devices import choose_device
from slime.config.errors import ConfigError, Problems

_DECIDED = {
    "sglang_host": "servers listen on loopback, in a cluster on their node's address (docs/security.md); leave it out",
    "router_prometheus_host": "the router's metrics are where the router listens; leave it out",
    "router_prometheus_port": "the router's metrics get a free port; leave it out",
    "router_request_timeout_secs": "type --sglang-router-request-timeout-secs, which slime's own requests obey too",
    "sglang_disaggregation_mode": (
        "engines that only prefill or only decode come in pairs; type --prefill-num-servers N, or describe the groups "
        "in --sglang-config"
    ),
}
"""Dest -> what to type instead."""


def the_run_places_its_servers(config: Config) -> None:
    """Addresses, devices and roles of servers follow from the placement."""
    problems = Problems()
    for dest, instead in _DECIDED.items():
        if dest in config.given and not config.skips_engines:
            problems.add(f"{_flag(dest)} is for the run to decide: {instead}")
    device, asked = choose_device(config).value, config.sglang.get("sglang_device")
    if "sglang_device" in config.given and asked != device and not config.skips_engines:
        problems.add(f"--sglang-device {asked}: engines compute on {device}, as the trainer; type --device {asked}")
    problems.raise_if_any()


def memory_share_is_a_share(config: Config) -> None:
    """--sglang-mem-fraction-static is a fraction of a GPU."""
    share = config.sglang.get("sglang_mem_fraction_static")
    if share is not None and not 0 < share < 1:
        raise ConfigError(
            f"--sglang-mem-fraction-static is {share:g}; it is the engine's share of a GPU, above 0 and below 1, e.g. "
            "--sglang-mem-fraction-static 0.8"
        )


def responses_fit_the_servers_context(config: Config) -> None:
    """A server refuses a request whose prompt and new tokens exceed its context."""
    context = config.sglang.get("sglang_context_length")
    if context is None:
        return
    rollout, evaluation = config.rollout, config.eval
    is_bounded = rollout.rollout_max_context_len is not None
    for flag, length in (
        ("--rollout-max-response-len", rollout.rollout_max_response_len if is_bounded else longest_response(config)),
        ("--eval-max-response-len", evaluation.eval_max_response_len),
    ):
        if length is not None and length >= context:
            raise ConfigError(
                f"{flag} {length} leaves no room for a prompt in --sglang-context-length {context}; lower the one or "
                "raise the other"
            )
    for flag, length in (
        ("--rollout-max-context-len", rollout.rollout_max_context_len),
        ("--eval-max-context-len", evaluation.eval_max_context_len),
    ):
        if length is not None and length > context:
            raise ConfigError(
                f"{flag} {length} is longer than --sglang-context-length {context}, so the servers would refuse such "
                f"requests; use at most {context}, or raise the other"
            )


def replies_have_text(config: Config) -> None:
    """slime's own generate function takes the response's text from the reply."""
    own_code = config.rollout.custom_generate_function_path is not None or not config.uses_default_rollout
    if config.sglang.get("sglang_skip_tokenizer_init") and not own_code:
        raise ConfigError(
            "--sglang-skip-tokenizer-init makes servers answer without text, which rewards read; drop it, or decode "
            "the tokens in a --custom-generate-function-path"
        )


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


RULES = (
    the_run_places_its_servers,
    memory_share_is_a_share,
    responses_fit_the_servers_context,
    replies_have_text,
)
