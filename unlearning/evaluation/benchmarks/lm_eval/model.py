"""The model as lm-evaluation-harness sees it."""

from lm_eval.models.huggingface import HFLM

from unlearning.data.chat import ChatFormat
from unlearning.evaluation.subject import Subject


class HarnessModel(HFLM):
    """A loaded model, whose chat template is rendered within limits and with a fixed date.

    lm-evaluation-harness' own class renders the template in this process, with today's date.
    """

    def __init__(self, subject: Subject, batch_size: int, chat: ChatFormat | None) -> None:
        """Wrap the model.

        Args:
            subject: The model.
            batch_size: Number of requests at a time.
            chat: The tokenizer's chat template; None if prompts are plain text.
        """
        super().__init__(pretrained=subject.model, tokenizer=subject.tokenizer, backend="causal", batch_size=batch_size)
        self.chat = chat
        self.takes_system = chat is not None and chat.takes_system()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of several turns.

        Args:
            chat_history: Role and content of each turn. Where the template has no system turns, those are left out, as
                lm-evaluation-harness does.
            add_generation_prompt: An answer is to begin; if not, the last turn is the beginning of the answer.

        Returns:
            The text.

        Raises:
            InputError: The template fails, or leaves out a part of a turn.
        """
        assert self.chat is not None, "evaluate asks for a template only if it is told to"
        turns = [(turn["role"], turn["content"]) for turn in chat_history]
        kept = [turn for turn in turns if self.takes_system or turn[0] != "system"]
        return self.chat.conversation(kept, continued=not add_generation_prompt)
