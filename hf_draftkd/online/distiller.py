"""`OnlineDraftDistiller`: a draft that learns from the requests it helps to serve.

Traffic drifts, and a draft made for last month's questions is accepted less often. With every answer the target writes
the data to mend that: each served request leaves its text and the target's distributions in a bounded buffer, and
between requests the draft learns from them. Whatever it learns, the served text stays the target's own: a draft decides
how fast an answer comes, never what it says.

The idea is Online Speculative Decoding's (https://arxiv.org/abs/2310.07177).
"""

import copy
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial, wraps
from threading import RLock
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.acceptance import AcceptanceCounts
from hf_draftkd.data.kept_distributions import CacheOptions, KeptDistributions
from hf_draftkd.decoding.drafting import checked_vocabulary
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.decoding.speculative import SpeculativeDecoding
from hf_draftkd.losses import SparseTarget
from hf_draftkd.models.forward import unwrapped
from hf_draftkd.models.identity import weights_fingerprint
from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.pairing import align_vocabulary, check_own_tokenizer, check_weights_apart, shared_vocab_size
from hf_draftkd.online.buffer import ReplayBuffer, ServedRequest
from hf_draftkd.online.config import OnlineDistillConfig
from hf_draftkd.online.learner import Learner, acceptance_of
from hf_draftkd.online.state import last_written, load_tensors, read_facts, save_state
from hf_draftkd.utils.files import check_writable

logger = logging.getLogger(__name__)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _one_at_a_time(method: _Method) -> _Method:
    """A method that waits until no other thread is in one of these."""

    @wraps(method)
    def alone(self: "OnlineDraftDistiller", *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, alone)


class OnlineDraftDistiller:
    """Serves a target with a draft, and teaches the draft between requests.

    Example:
    ```python
    from hf_draftkd import OnlineDistillConfig, OnlineDraftDistiller

    distiller = OnlineDraftDistiller(draft, target, tokenizer, args=OnlineDistillConfig(output_dir="online"))
    distiller.resume()  # continues where the last process stopped, if there was one
    for inputs in requests:
        output = distiller.generate(**inputs, max_new_tokens=256)  # what target.generate returns
    print(distiller.counts.draft_acceptance_rate)
    distiller.draft_model.save_pretrained("draft")
    ```

    Requests are decoded by [`SpeculativeDecoding`], alone or in batches, with the draft length of the draft's
    generation config, or, where it names none, the one that pays best so far. No thread is started: an update happens
    inside `generate` after every `args.update_every` requests, or, with `args.auto_update=False`, when you call
    `step()`. Calls from several threads wait for each other. The serving loop may run under `torch.inference_mode()` or
    `torch.no_grad()`.

    An update is measured before it is kept: exact acceptance of the draft before and after it on requests that were
    never learned from, each under the setting it was decoded with. If acceptance fell, weights and optimiser are put
    back.

    No failure of learning or saving costs an answer. If an automatic update or save inside `generate` fails (out of
    memory, a full disk, an `on_log` that raises), the error is logged with its traceback and noted in `history`. A
    failed update leaves the draft as it was, and the next one learns from its requests as well; the next save writes
    everything. Your own calls of `step()` and `save()` raise.

    The draft is trained in place and is in evaluation mode except inside an update. A bfloat16 draft learns in float32
    copies of its weights, in which small updates are not lost. The target is never written to.

    Args:
        draft_model: The draft, with an adapter or without; its trainable parameters learn. A differently padded
            vocabulary is aligned in place.
        target_model: The target, in evaluation mode.
        tokenizer: The one that both share. Without it, rows that are padding in both models count as tokens.
            `stop_strings` need it.
        args: Configuration, an [`OnlineDistillConfig`].
        on_log: Receives every entry of `history` as it arises, e.g. `wandb.log`.

    Attributes:
        history: One dictionary for each `step` that had something to learn from, oldest first: `num_requests` served
            so far; `draft_acceptance_rate` and `mean_acceptance_length` counted while serving since the step before;
            `num_tokens` learned from and their mean `loss`; `held_out_acceptance_rate_before` and
            `held_out_acceptance_rate`, exact, absent while nothing is held out; `kept`, whether the new weights
            stayed; `seconds`. A failed update or save inside `generate` has its own entry, with only `num_requests`,
            `failed` (`"step"` or `"save"`) and `error`.
        counts: Drafted and accepted tokens of all requests, those before `resume` included.
        num_requests: Requests served.
        num_updates: Updates that were kept.
        buffer: The requests to learn from, and those held out.
        learner: The trained weights and their optimiser.

    Raises:
        ValueError: The pair does not fit, nothing of the draft can be trained (or it was loaded under
            `torch.inference_mode()`), the target is in training mode, or `args.output_dir` cannot be written to.
    """

    @torch.inference_mode(False)  # Weights made under it, for a longer vocabulary or a bfloat16 draft, could not learn.
    def __init__(
        self,
        draft_model: Any,
        target_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        args: OnlineDistillConfig | None = None,
        on_log: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.args = args or OnlineDistillConfig()
        _check_pair(draft_model, target_model, tokenizer)
        align_vocabulary(unwrapped(draft_model), unwrapped(target_model), tokenizer)
        self.draft_model, self.target_model, self.tokenizer = draft_model, target_model, tokenizer
        self.history: deque[dict[str, Any]] = deque(maxlen=self.args.max_history)
        self.counts = AcceptanceCounts()
        self.num_requests = self.num_updates = 0

        self._vocab_size = shared_vocab_size(unwrapped(draft_model), unwrapped(target_model), tokenizer)
        self._top_k = min(self.args.top_k, self._vocab_size)
        self.buffer = ReplayBuffer(
            self.args.buffer_size, self.args.holdout_size, self.args.holdout_share, self.args.seed
        )
        # It learns next tokens alone, of the list that it may propose from, and is judged by them.
        self._decoding = SpeculativeDecoding(draft_model, parallel=False)
        listed = self._decoding.draft_vocabulary
        self._vocabulary = None if listed is None else checked_vocabulary(listed, self._vocab_size)
        self.learner = Learner(draft_model, self._vocab_size, self.args, self._vocabulary)
        self._on_log, self._lock = on_log, RLock()
        self._generator = torch.Generator().manual_seed(self.args.seed)
        self._window = AcceptanceCounts()  # since the last step
        self._requests_at_step = 0
        self._must_resume = False
        self._last_written: int | None = None  # the state in `output_dir`, by this distiller or read by it
        if self.args.output_dir is not None:
            check_writable(self.args.output_dir, f"`output_dir={self.args.output_dir!r}`")
            self._must_resume = read_facts(self.args.output_dir) is not None

    # Serving ---------------------------------------------------------------------------------------------------------

    @_one_at_a_time
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """`target_model.generate(..., custom_generate=SpeculativeDecoding(draft_model))`, remembered.

        Takes what `generate` takes (`input_ids`, `attention_mask`, `max_new_tokens`, `streamer`, ...); each text of a
        batch is a request by itself.

        Returns:
            What `target_model.generate` returned, even if the update or save after it failed.

        Raises:
            ValueError: There are no token ids, or another `assistant_model` was given; the request is one that
                `SpeculativeDecoding` refuses (beams, guidance, `output_attentions`, ...): call `target_model.generate`
                for such; or the output directory holds a state that `resume` was not called for.
        """
        for name in ("assistant_model", "custom_generate"):
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` is the distiller's own: leave it out, or call `target_model.generate`.")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("A request is learned from by its token ids: give `input_ids` instead of `inputs_embeds`.")
        self._check_resumed()
        # How `generate` will decode, the target's own defaults filled in.
        config, _ = unwrapped(self.target_model)._prepare_generation_config(generation_config, **kwargs)
        options = CacheOptions(self._top_k, loss_temperature=self.args.loss_temperature, dtype="float32")
        kept = KeptDistributions(options, self._vocab_size)
        decoding = self._decoding
        decoding.counts, decoding.on_logits = AcceptanceCounts(), kept.add
        decoding.tokenizer = kwargs.get("tokenizer") or self.tokenizer
        output = self.target_model.generate(
            inputs, generation_config=generation_config, custom_generate=decoding, **kwargs
        )
        self.counts += decoding.counts
        self._window += decoding.counts
        sequences = output if isinstance(output, Tensor) else output.sequences
        num_before, setting = self.num_requests, _setting(config, kwargs)
        copies = len(sequences) // len(ids)  # `num_return_sequences`
        for row, sequence in enumerate(sequences):
            prompt = ids[row // copies, decoding.prompt_padding[row] :].cpu()
            completion = sequence[ids.shape[1] :][: kept.num_tokens(row)]  # behind it there is padding
            self._remember(prompt, completion, partial(kept.target, row), setting)
        if self.args.auto_update and self.update_due:
            self._attempt("step", self.step)
        every = self.args.save_every
        if self.args.output_dir is not None and self.num_requests // every > num_before // every:
            self._attempt("save", self.save)
        return output

    def _attempt(self, name: str, action: Callable[[], Any]) -> None:
        """Do what is due while a finished answer waits; no failure may cost that answer."""
        try:
            action()
        except Exception as error:
            logger.exception("The automatic `%s` after request %d failed.", name, self.num_requests)
            cause = f"{type(error).__name__}: {error}"
            try:
                self._note({"num_requests": self.num_requests, "failed": name, "error": cause})
            except Exception:
                logger.exception("`on_log` failed on the entry about it.")

    def _note(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        if self._on_log is not None:
            self._on_log(dict(entry))

    @property
    def update_due(self) -> bool:
        """Whether `args.update_every` requests were served since the last `step`."""
        return self.num_requests - self._requests_at_step >= self.args.update_every

    @torch.inference_mode(False)  # What is kept outlives the caller's `inference_mode`: it must be ordinary tensors.
    def _remember(
        self,
        prompt: Tensor,
        completion: Tensor,
        target: Callable[[int], SparseTarget],
        setting: DecodingSetting | None,
    ) -> None:
        self.num_requests += 1
        # Copies: `prompt` may be the caller's own memory, and `completion` is that of the output.
        prompt = prompt.clone()
        kept = completion[: max(0, self.args.max_length - len(prompt))].cpu().clone()
        # A target may write an id from its vocabulary's padding; from there on nothing can be learned.
        unknown = (torch.cat([prompt, kept]) >= self._vocab_size).nonzero()
        if len(unknown):
            kept = kept[: max(0, int(unknown[0]) - len(prompt))]
        if len(prompt) and len(kept):
            self.buffer.add(ServedRequest(prompt, kept, target(len(kept)), setting))

    # Learning --------------------------------------------------------------------------------------------------------

    @_one_at_a_time
    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(self) -> dict[str, Any] | None:
        """Learn from what was served since the last step, and keep the result only if held-out acceptance did not fall.

        Returns:
            The new entry of `history`; None if no request to learn from has arrived.

        Raises:
            Exception: Whatever went wrong (such as out of memory), after the draft was put back as it was. A loss or
                gradient that is NaN or Inf does not raise: the update is discarded and logged, and serving continues.
        """
        self._requests_at_step = self.num_requests
        if not self.buffer.num_new:
            return None
        started = time.perf_counter()
        counted = self._window.to_dict()
        rates = ("draft_acceptance_rate", "mean_acceptance_length")
        entry: dict[str, Any] = {"num_requests": self.num_requests} | {k: counted[k] for k in rates if k in counted}
        with self._own_random_state(), self.learner.undoable() as undo:
            try:
                entry |= self._learn()
            except FloatingPointError as error:
                logger.warning("An update was discarded: %s", error)
                entry["kept"] = False
            if not entry["kept"]:
                undo()
        if entry["kept"]:
            self._serve_new_weights()
        # Only now: after an error the next update reports these requests and learns from them as well.
        self._window = AcceptanceCounts()
        self.buffer.num_new = 0
        self.num_updates += entry["kept"]
        entry["seconds"] = time.perf_counter() - started
        logger.info("Online update: %s", entry)
        self._note(entry)
        return entry

    def _learn(self) -> dict[str, Any]:
        args, held_out = self.args, self.buffer.held_out
        before = copy.deepcopy(self.draft_model) if held_out else None
        if before is not None and not hasattr(before, "_hf_hook"):
            vars(before).pop("forward", None)  # a trainer of TRL's leaves one that runs the original
        batches = self.buffer.batches(args.batch_size, args.num_epochs, args.replay_ratio, self._generator)
        entry: dict[str, Any] = self.learner.learn(batches)
        if not held_out:
            return entry | {"kept": True}
        entry["held_out_acceptance_rate_before"], entry["held_out_acceptance_rate"] = acceptance_of(
            [before, self.draft_model],
            self.target_model,
            held_out,
            vocab_size=self._vocab_size,
            batch_size=args.batch_size,
            vocabulary=self._vocabulary,
        )
        return entry | {"kept": entry["held_out_acceptance_rate"] >= entry["held_out_acceptance_rate_before"]}

    def _serve_new_weights(self) -> None:
        """A head cut to its draft vocabulary is a copy: cut it again. What was measured of lengths stays."""
        if self._vocabulary is not None:
            length = self._decoding.length
            self._decoding = SpeculativeDecoding(self.draft_model, parallel=False)
            self._decoding.length = length

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Let dropout and sampled losses draw from a separate state: what is served next must not depend on them."""
        accelerators = {model.device for model in (self.draft_model, self.target_model) if model.device.type != "cpu"}
        kind = {"device_type": next(iter(accelerators)).type} if accelerators else {}
        with torch.random.fork_rng(devices=accelerators, **kind):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self._generator)))
            yield

    # State -----------------------------------------------------------------------------------------------------------

    @_one_at_a_time
    def save(self, directory: str | None = None) -> None:
        """Write weights, optimiser, buffer, counters and history, whole or not at all, into `directory` or
        `args.output_dir`.

        `generate` does it automatically every `args.save_every` requests if `args.output_dir` is set. For a draft that
        others can load, call `draft_model.save_pretrained`.

        Raises:
            ValueError: Neither is given, or `args.output_dir` holds the state of an earlier run, or what another
                process has saved since.
        """
        directory, is_own = self._state_directory(directory)
        if is_own:
            self._check_resumed()
            if last_written(directory) not in (None, self._last_written):
                raise ValueError(
                    f"Another process has saved its state to `output_dir={directory!r}`, and it would be overwritten. "
                    "Give each server a directory of its own."
                )
        requests, buffer = self.buffer.pack()
        random = {"generator": self._generator.get_state()}
        facts = {
            **self._identity,
            "buffer": buffer,
            "num_requests": self.num_requests,
            "num_updates": self.num_updates,
            "requests_at_step": self._requests_at_step,
            "history": list(self.history),
            "counts": vars(self.counts),
            "window": vars(self._window),
        }
        save_state(directory, {"draft": self.learner.state(), "requests": requests, "random": random}, facts)
        if is_own:
            self._last_written = last_written(directory)

    @_one_at_a_time
    @torch.inference_mode(False)
    def resume(self, directory: str | None = None) -> bool:
        """Continue from a saved state: weights, optimiser, buffer, counters, history and random state.

        Returns:
            False if nothing was ever saved in `directory` or `args.output_dir`; the distiller is then unchanged.

        Raises:
            ValueError: The state cannot be read, or belongs to another draft, target, `top_k` or `loss_temperature`.
        """
        directory, is_own = self._state_directory(directory)
        facts = read_facts(directory)
        if facts is None:
            return False
        for name, value in self._identity.items():
            if facts[name] != value:
                raise ValueError(
                    f"The state in {directory!r} was saved with {name}={facts[name]!r}, and here it is {value!r}, so "
                    "the distributions in its buffer are of no use. Set it as it was, or name another `output_dir`."
                )
        tensors = load_tensors(directory)
        self.learner.load(tensors["draft"])
        self._serve_new_weights()
        self._generator.set_state(tensors["random"]["generator"])
        self.buffer.unpack(tensors["requests"], facts["buffer"])
        self.num_requests, self.num_updates = facts["num_requests"], facts["num_updates"]
        self._requests_at_step = facts["requests_at_step"]
        self.history = deque(facts["history"], maxlen=self.args.max_history)
        self.counts, self._window = AcceptanceCounts(**facts["counts"]), AcceptanceCounts(**facts["window"])
        if is_own:
            self._must_resume, self._last_written = False, last_written(directory)
        return True

    def _state_directory(self, directory: str | None) -> tuple[str, bool]:
        """The directory to use, and whether it is `args.output_dir`, which is guarded against overwriting."""
        own = self.args.output_dir
        directory = directory if directory is not None else own
        if directory is None:
            raise ValueError("There is no directory for the state: give one, or set `args.output_dir`.")
        return directory, own is not None and os.path.abspath(own) == os.path.abspath(directory)

    def _check_resumed(self) -> None:
        """Refuse to overwrite what an earlier process has learned."""
        if self._must_resume:
            raise ValueError(
                f"`output_dir={self.args.output_dir!r}` holds the state of an earlier run, which would be overwritten. "
                "Call `resume()` before serving to continue from it, or name another directory."
            )

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What the kept distributions depend on: a buffer is only of use where all of this is the same."""
        return {
            "target": weights_fingerprint(unwrapped(self.target_model)),
            "vocab_size": self._vocab_size,
            "top_k": self._top_k,
            "loss_temperature": self.args.loss_temperature,
        }


def _setting(config: GenerationConfig, kwargs: Mapping[str, Any]) -> DecodingSetting | None:
    """How `generate` decodes with this config and these arguments; None where temperature, top-k, top-p and repetition
    penalty do not describe it.
    """
    if kwargs.get("logits_processor") or kwargs.get("prefix_allowed_tokens_fn"):
        return None
    try:
        return DecodingSetting.from_generation_config(config)
    except ValueError:
        return None


def _check_pair(draft: Any, target: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    require_loaded(draft, target)
    if tokenizer is not None:
        check_own_tokenizer(unwrapped(draft), tokenizer)
        check_own_tokenizer(unwrapped(target), tokenizer, is_target=True)
    check_weights_apart(draft, target)
    if target.training:
        raise ValueError("The target is in training mode, where dropout changes its output. Call `target.eval()`.")
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            "Online distillation runs in one process: each of several would train a different draft. Serve replicas "
            "with plain `generate`, and train in one of them."
        )
