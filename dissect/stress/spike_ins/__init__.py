"""Spike-ins: invented people in a copy of the unlearned model give an attack its own zero, ceiling and power there.

    hidden        invented people whose facts the copy was taught and then made to hide: what the attack can find
    never shown   invented people of whom the copy was told nothing: what the attack finds where there is nothing

All of them go through the attack as the user's own facts do, in the copy and, before anybody is planted, in the model
itself, where the hidden people are as unknown as the others. With r the mean rank under the attack,

    zero    = r of the people whom the attacked model was never shown: all in the model, the never shown in the copy
    gain    = r of the hidden people in the copy - r of the same people in the model
    score   = (r of the user's facts - zero) / gain

The score is 0 where the attack finds as little as of people who do not exist, and 1 where it finds as much as of facts
that were hidden a moment ago (ceiling = zero + gain). It needs neither a base nor a control, and takes nothing from
other models. Both terms of the gain are of the same questions, answers and distractors, so that an invented answer
that happens to suit its question cancels.

People are hidden by a mild unlearning (NPO with cross-entropy on what is to stay, 2404.05868), so the ceiling is that
of suppressed knowledge, and not that of knowledge that is still shown.
"""
