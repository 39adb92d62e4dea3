"""ELM (erasure of language memory): on the forget texts the model becomes what its reference is as a novice.

Loss: J = gamma F + alpha R, F = mean_t KL(q_t || p_t) over the forget answers' tokens. The target q_t is p_t^ref
(p_t^novice / p_t^expert)^eta, normalised: the reference model's distributions on the text alone, after the line
`novice`, and after the line `expert`, both about `concept`. R is KL(reference || model) or the cross-entropy on retain.
Needs: forget data, a concept, and logits of the reference model after the two lines, computed once and added up before
the first step; retain data unless alpha = 0. The larger eta, the closer q_t is to a single token, and the more the
logits' rounding counts: compute in float32.
Source: ELM, arXiv 2410.02760. Differs from the paper: no fluency loss, on texts that the reference model writes in the
novice's place; all weights train, and not an adapter of early blocks (`lora_rank` and `lora_targets` ask for that).
Differs from its code: that draws the two lines from ten of each, lets eta rise from 1 along a text, divides logits by
1.2, keeps the 50 likeliest tokens of q_t, and on retain takes the reference's likeliest token as the target.
"""

from dataclasses import dataclass

from unlearning.common.errors import InputError
from unlearning.methods.method import Method, Needs, Reference
from unlearning.methods.terms import RetainLoss, forget_divergence, retain_references, retain_term
from unlearning.options import KEEPS, option

SOURCE = "ELM 2410.02760"
CONCEPT = "{concept}"


@dataclass(frozen=True)
class ELMOptions:
    """Options of ELM."""

    concept: str | None = option(None, "what is to be forgotten, in words, such as biosecurity", required=True)
    novice: str = option(
        f"The text is written by a novice, with no knowledge about {CONCEPT} and steering the conversation to random "
        "fun topics:",
        "line before the texts that makes their writer know nothing of {concept}",
        source="ELM's code",
    )
    expert: str = option(
        f"Here is a text written by an expert of {CONCEPT}, with all the knowledge:",
        "line before the texts that makes their writer know {concept}",
        source="ELM's code",
    )
    eta: float = option(1000.0, "power of p(x | novice) / p(x | expert)", source="ELM's code", above=0)
    gamma: float = option(1.0, "weight of the forget loss", source="ELM's code", above=0)
    alpha: float = option(3.0, "weight of the retain loss (0: none)", source="measured; ELM's code: 1", minimum=0)
    retain_loss: RetainLoss = option("kl", "loss on retain data: nll or kl", source=SOURCE, read_if=KEEPS)


def lines(options: ELMOptions) -> tuple[str, str]:
    """Return what stands before the texts, of a novice and of an expert.

    Raises:
        InputError: A line does not name the concept, or both are the same.
    """
    for name in ("novice", "expert"):
        if CONCEPT not in getattr(options, name):
            raise InputError(f"`{name}` must contain {CONCEPT}, got {getattr(options, name)!r}")
    if options.novice == options.expert:
        raise InputError("`novice` and `expert` must differ: the targets would be the reference model itself")
    concept = options.concept or ""  # a run has one: it must be set
    novice, expert = (each.replace(CONCEPT, concept) + "\n" for each in (options.novice, options.expert))
    return novice, expert


def needs(options: ELMOptions) -> Needs:
    """Return the data, the logits of the targets q_t, and what the retain loss reads."""
    novice, expert = lines(options)
    # A softmax drops what is added to all logits of a token, so logits may stand for log-probabilities.
    targets = Reference("forget", "logits", prefixes=(("", 1.0), (novice, options.eta), (expert, -options.eta)))
    return Needs(retain=options.alpha > 0, references=(targets, *retain_references(options)))


ELM = Method(
    name="elm",
    summary="gamma KL(q, p) on forget + alpha R, q = p_ref (p_ref(novice) / p_ref(expert))^eta, normalised",
    source=SOURCE,
    options=ELMOptions,
    needs=needs,
    needs_note="a concept, forget, reference, retain unless alpha=0",
    forget_loss=forget_divergence,
    retain_loss=retain_term,
)
