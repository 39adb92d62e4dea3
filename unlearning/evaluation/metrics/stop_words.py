"""English function words: articles, pronouns, prepositions, conjunctions, auxiliaries, and what contractions leave."""

STOP_WORDS = frozenset(
    """
    a an the this that these those some any each every either neither no none both all few many much more most other
    another such same own i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his
    himself she her hers herself it its itself they them their theirs themselves one who whom whose which what whoever
    about above across after against along among around as at before behind below beneath beside besides between
    beyond by despite down during except for from in inside into like near of off on onto out outside over past per
    since through throughout to toward towards under until up upon via with within without and but or nor so yet if
    because although though unless while whereas whether than then when where why how am is are was were be been being
    do does did doing done have has had having will would shall should can could may might must not only very too also
    just again further once here there now ever never s t d m o y ll re ve don didn doesn isn aren wasn weren hasn
    haven hadn won wouldn couldn shouldn ain mustn needn
    """.split()
)
