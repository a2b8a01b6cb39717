"""Lets a small language model write prompts out: any causal one that transformers loads, picked by the user.

It is loaded at the first use and lives on a thread of its own and on the CPU. It takes nothing of a GPU's memory, but 4
bytes of main memory for each of its parameters, and cores: a video model that runs on the CPU shares both with it.
Nothing of it is imported, fetched or asked before somebody wants a suggestion.

    enhancer = LanguageEnhancer("models/SmolLM2-360M-Instruct")
    print(enhancer.enhance("a red balloon").text)
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipeline.config import MAX_PROMPT_CHARS, checked_prompt, checked_variant
from pipeline.disk import free_disk
from pipeline.enhance import Suggestion
from pipeline.errors import (
    Cancelled,
    DeadlineExceeded,
    DownloadError,
    InvalidRequest,
    OutOfMemory,
    SelfForcingError,
    WeightsError,
)
from pipeline.load_lock import LOAD_LOCK

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ENHANCER_HELP = (
    "a language model that writes prompts out when asked to: its folder, or its name on the Hugging Face Hub with the "
    "40 digits of a revision (default: none)"
)
MAX_NEW_TOKENS = 160
MAX_SECONDS = 60.0
MAX_WAITING = 4
"""Questions that wait for their turn; more are refused at once."""
TEMPERATURE, TOP_P = 0.7, 0.9
INSTRUCTION = (
    "Rewrite this idea for a video as one detailed prompt of 60 to 90 words for a text-to-video model. Keep everything "
    "that the idea says. Add what things look like, where they are, the light, how they move and how the camera does. "
    "Write plain sentences in English and nothing else.\n\nIdea: {prompt}"
)
CONTINUATION = "{instruction}\n\nPrompt:"
"""For models that only go on with a text, without a form for questions and answers."""
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?@[0-9a-f]{40}")
_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""What of a repository is downloaded, at its top: no code, no weights in other formats."""
_NOT_FETCHED = ("*/*", "consolidated*")
"""Sub-folders, and a second copy of the weights that some repositories have."""
_POLL_SECONDS = 0.1
_THINKING = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


class LanguageEnhancer:
    """Suggestions by a language model. Any thread may ask; the answers are made one after the other.

    Args:
        source: a folder of a model, or `name@revision` on the Hugging Face Hub, with all 40 digits of the revision.
        max_new_tokens: longest answer.
        max_seconds: longest time that whoever asks waits for an answer, the wait for others included.

    Raises:
        InvalidRequest: `source` is neither.
        WeightsError: the folder is no model, or not in safetensors files.
    """

    def __init__(self, source: str, *, max_new_tokens: int = MAX_NEW_TOKENS, max_seconds: float = MAX_SECONDS) -> None:
        self._place = checked_source(source)
        self.name = Path(source).name if self._place.revision is None else source.partition("@")[0]
        self._max_new_tokens = max_new_tokens
        self._max_seconds = max_seconds
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._waiting: deque[_Question] = deque()
        self._current: _Question | None = None
        self._thread: threading.Thread | None = None
        self._capped: threading.Thread | None = None
        self._lock = threading.Condition()
        self._closed = False

    @property
    def loaded(self) -> bool:
        return self._model is not None

    def enhance(self, prompt: str, variant: int = 0, cancel: threading.Event | None = None) -> Suggestion:
        """See `Enhancer.enhance`. Blocks the caller, for `max_seconds` at most.

        Args:
            cancel: Ends the question when it is set.

        Raises:
            Cancelled: `cancel` was set, or the program ends.
            DeadlineExceeded: it took too long. A model that was being loaded goes on loading.
            WeightsError, DownloadError: the model cannot be loaded. The next question tries again.
        """
        question = _Question(checked_prompt(prompt), checked_variant(variant), self._max_seconds, cancel)
        self._put(question)
        try:
            while not question.done.wait(_POLL_SECONDS):
                if self._closed:
                    raise Cancelled("The language model was shut down.")
                if question.over:
                    raise question.why_over(loading=not self.loaded)
        finally:
            question.left.set()
            with self._lock:
                if question in self._waiting:  # its place is free at once, though another one is being answered
                    self._waiting.remove(question)
        if question.error is not None:
            raise question.error
        assert question.answer is not None
        return question.answer

    def close(self, timeout: float | None = 2.0) -> bool:
        """End the thread after the token that is being made. Returns whether it ended within `timeout`."""
        with self._lock:
            self._closed = True
            thread = self._thread
            if self._current is not None:
                self._current.left.set()
            self._lock.notify_all()
        if thread is None:
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _put(self, question: _Question) -> None:
        """Give it a place, and see to it that there is a thread to answer it."""
        with self._lock:
            if self._closed:
                raise Cancelled("The language model was shut down.")
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.over)
            if len(self._waiting) >= MAX_WAITING:
                raise SelfForcingError("The language model has too many questions to answer. Ask again later.")
            self._waiting.append(question)
            self._lock.notify_all()
            if self._thread is None or not self._thread.is_alive():
                # A daemon: a program that wants to end must not wait for a download.
                self._thread = threading.Thread(target=self._work, name="language model", daemon=True)
                self._thread.start()

    # ---- on its own thread

    def _work(self) -> None:
        while (question := self._next()) is not None:
            try:
                if not question.over:
                    question.answer = self._answer(question)
            except SelfForcingError as error:
                question.error = error
            except MemoryError as error:
                question.error = _caused(OutOfMemory("There is not enough memory for the language model."), error)
            except BaseException as error:  # a tokenizer's panic, or SystemExit, is no Exception
                logger.exception("The language model failed")
                told = SelfForcingError("The language model failed. Ask again, or write the prompt yourself.")
                question.error = _caused(told, error)
            finally:
                self._current = None
                if question.answer is not None or question.error is not None:
                    question.done.set()

    def _next(self) -> _Question | None:
        """Wait for a question; None: the program ends."""
        with self._lock:
            self._lock.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _answer(self, question: _Question) -> Suggestion:
        if self._capped is not threading.current_thread():
            _leave_a_core()
            self._capped = threading.current_thread()
        if self._model is None:
            self._model, self._tokenizer = self._place.load()
        assert self._tokenizer is not None
        text, unfinished = self._ask(self._model, self._tokenizer, question)
        return Suggestion(cleaned(text, unfinished), (f"Written by {self.name}.",))

    def _ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: _Question) -> tuple[str, bool]:
        """What the model writes, and whether it would have gone on."""
        import torch
        from transformers import (
            GenerationConfig,
            LogitsProcessor,
            LogitsProcessorList,
            StoppingCriteria,
            StoppingCriteriaList,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        class Drawn(LogitsProcessor):
            """Adds Gumbel noise: the best token is then one drawn from the distribution.

            The library's own sampling draws from torch's generator, which belongs to everybody in the program.
            """

            def __init__(self, seed: int) -> None:
                self._generator = torch.Generator().manual_seed(seed)

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                noise = torch.empty_like(scores).exponential_(generator=self._generator).log_()
                return scores - noise

        class Over(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                return torch.full((len(input_ids),), question.over)

        tokens = self._tokens(tokenizer, question.prompt)
        room = getattr(model.config, "max_position_embeddings", None)
        if room is not None and tokens.shape[1] + self._max_new_tokens > room:
            raise InvalidRequest(
                f"The prompt is too long for {self.name}, which reads and writes {room} tokens. Ask with a shorter one."
            )
        ends = model.generation_config.eos_token_id
        config = GenerationConfig(
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            logits_processor=LogitsProcessorList(
                [TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P), Drawn(question.variant)]
            ),
            stopping_criteria=StoppingCriteriaList([Over()]),
        )
        if question.over:
            raise question.why_over(loading=False)
        written = whole[0, tokens.shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        ended = config.eos_token_id is not None and int(written[-1]) in _as_list(config.eos_token_id)
        return text, not ended

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
        """[1, T] token numbers of the question, in the form that the model was trained on."""
        instruction = INSTRUCTION.format(prompt=prompt)
        if tokenizer.chat_template is None:
            return tokenizer(CONTINUATION.format(instruction=instruction), return_tensors="pt").input_ids
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            enable_thinking=False,  # templates that know no thinking ignore it
        )["input_ids"]


class _Question:
    """One prompt, and the answer to it when it is `done`."""

    def __init__(self, prompt: str, variant: int, max_seconds: float, cancel: threading.Event | None) -> None:
        self.prompt = prompt
        self.variant = variant
        self.done = threading.Event()
        self.left = threading.Event()
        """Set when nobody waits for the answer any more."""
        self._cancel = cancel or threading.Event()
        self.answer: Suggestion | None = None
        self.error: SelfForcingError | None = None
        self._max_seconds = max_seconds
        self._deadline = time.monotonic() + max_seconds

    @property
    def over(self) -> bool:
        return self.left.is_set() or self._cancel.is_set() or time.monotonic() > self._deadline

    def why_over(self, *, loading: bool) -> SelfForcingError:
        if self.left.is_set() or self._cancel.is_set():
            return Cancelled("The question was dropped.")
        if loading:
            return DeadlineExceeded("The language model is still being loaded. Ask again in a moment.")
        return DeadlineExceeded(
            f"The language model took longer than {self._max_seconds:g} s. Ask again later, or write the prompt "
            "yourself."
        )


class _Place:
    """Where a language model comes from."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        """A folder, or an id on the hub."""
        self.revision = revision
        """None for a folder."""

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer, on the CPU in float32.

        Raises:
            DownloadError: the hub does not give it, or there is no room for it.
            OutOfMemory: there is not enough memory now.
            WeightsError: it is no causal language model in safetensors, needs code of its own, or is damaged.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # it counts layers; a download has a bar of its own
        shown = f"The language model {Path(self.name).name if self.revision is None else self.name}"
        folder = Path(self.name) if self.revision is None else self._fetched(shown)
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            with LOAD_LOCK:
                _check_memory(folder, shown)  # here: what was loaded while this waited has its memory now
                tokenizer = AutoTokenizer.from_pretrained(folder, **options)
                model, report = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            logger.info("The language model cannot be loaded", exc_info=True)
            raise WeightsError(
                f"{shown} cannot be loaded: it is damaged, needs code of its own, or is no causal language model in "
                "safetensors files. Write the prompt yourself."
            ) from error
        if missing := sorted(report.get("missing_keys") or ()):
            raise WeightsError(
                f"{shown} is incomplete: {len(missing)} tensors are missing, the first is {missing[0]}. Write the "
                "prompt yourself."
            )
        return model.eval().requires_grad_(False), tokenizer

    def _fetched(self, shown: str) -> Path:
        """The folder of a hub's files at the revision, downloaded if they are not here yet."""
        import huggingface_hub
        from huggingface_hub import constants

        wanted: dict[str, Any] = {
            "revision": self.revision,
            "allow_patterns": list(_FETCHED),
            "ignore_patterns": list(_NOT_FETCHED),
        }
        try:
            files = huggingface_hub.snapshot_download(self.name, dry_run=True, **wanted)
            missing = sum(file.file_size or 0 for file in files if file.will_download)
        except Exception:  # the size is not known; the download says what is wrong, if anything is
            logger.info("The size of the language model is not known", exc_info=True)
            missing = 0
        if missing and missing > (free := free_disk(Path(constants.HF_HUB_CACHE))):
            raise DownloadError(
                f"{shown} is {_gigabytes(missing)} to download, but only {_gigabytes(free)} are free on the disk. "
                "Write the prompt yourself."
            )
        try:
            return Path(huggingface_hub.snapshot_download(self.name, **wanted))
        except Exception as error:
            logger.info("The language model cannot be fetched", exc_info=True)
            raise DownloadError(
                f"{shown} cannot be fetched at this revision: there is none of this name, or no way to it. "
                "Ask again later, or write the prompt yourself."
            ) from error


def checked_source(source: str) -> _Place:
    """See `LanguageEnhancer`."""
    folder = Path(source).expanduser()
    is_hub_id = _HUB_ID.fullmatch(source) is not None
    try:
        is_folder = folder.is_dir()
    except (OSError, ValueError):  # a name that the file system cannot have
        is_folder = False
    if is_folder and is_hub_id:
        raise InvalidRequest(
            f"enhancer is {_shown(source)}, which is a folder here and could be a revision on the Hugging Face Hub. "
            "Write ./ before the name of the folder, or rename it."
        )
    if not is_folder:
        if not is_hub_id:
            raise InvalidRequest(
                f"enhancer is {_shown(source)}, but must be the folder of a language model, or its name on the Hugging "
                "Face Hub with the 40 digits of a revision: name@0123456789abcdef0123456789abcdef01234567."
            )
        name, _, revision = source.partition("@")
        return _Place(name, revision)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder.name!r} is no language model: it has no config.json that can be read. Name another folder with "
            "--enhancer."
        ) from error
    if not isinstance(config, dict) or not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{folder.name!r} has no weights in safetensors files, the only ones that are read. Name another folder "
            "with --enhancer."
        )
    return _Place(str(folder), None)


def cleaned(text: str, unfinished: bool = False) -> str:
    """What a language model wrote, as a prompt: one paragraph without thoughts and quotes, within the limits.

    Args:
        unfinished: It may end in the middle of a sentence, which is then left away, if there are whole ones.

    Raises:
        SelfForcingError: nothing is left.
    """
    text = _THINKING.sub("", text).rpartition("</think>")[2]
    paragraphs = (part.strip() for part in re.split(r"\n\s*\n", text.strip()))
    text = next((part for part in paragraphs if part), "")
    text = re.sub(r"^\**prompt\**\s*:\**\s*", "", text, flags=re.IGNORECASE).strip("\"'“”` \n")
    if len(text) > MAX_PROMPT_CHARS:
        unfinished = True
        text = text[:MAX_PROMPT_CHARS].rpartition(" ")[0] or text[:MAX_PROMPT_CHARS]
    if unfinished and (ends := [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]):
        text = text[: ends[-1]]
    try:
        return checked_prompt(text)
    except InvalidRequest as error:
        raise SelfForcingError(
            "The language model wrote nothing that can be used. Ask again, or write the prompt yourself."
        ) from error


def _as_list(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else value


def _leave_a_core() -> None:
    """Let torch use one core less on this thread, and on no other one."""
    import torch

    usual = torch.get_num_threads()  # also makes this thread take over the usual number, which it would do later
    if usual < 2:
        return
    torch.set_num_threads(usual - 1)
    # That was this thread's own number and the one that new threads begin with. The latter is put back elsewhere.
    restoring = threading.Thread(target=torch.set_num_threads, args=(usual,))
    restoring.start()
    restoring.join()


def _check_memory(folder: Path, shown: str) -> None:
    """Raises `OutOfMemory` if the weights, as float32, are larger than the memory that is free now."""
    needed, free = _float32_bytes(folder), psutil.virtual_memory().available
    if needed > free:
        raise OutOfMemory(
            f"{shown} needs {_gigabytes(needed)} of memory, but only {_gigabytes(free)} are free. Ask again later, or "
            "write the prompt yourself."
        )


def _float32_bytes(folder: Path) -> int:
    """Of the tensors in a model's safetensors files; files that cannot be read count as nothing."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = {folder / name for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        single = folder / "model.safetensors"
        files = {single} if single.is_file() else set(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, path.stat().st_size)))
            total += sum(4 * math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return total


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _shown(source: str) -> str:
    return repr(source if len(source) <= 60 else f"{source[:57]}...")


def _caused(error: SelfForcingError, cause: BaseException) -> SelfForcingError:
    error.__cause__ = cause
    return error
