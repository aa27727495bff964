"""The subject in a caption: the token and the class word, put where training looks for them."""

from __future__ import annotations

import re

from coeffdiff.models.subject_token import holds


def with_subject(caption: str, token: str, class_word: str | None) -> str:
    """A caption on one line that names the subject once.

    The token goes before the first mention of the class word: "a photo of a dog" becomes "a photo of a ohwx dog".
    A caption without the class word gets both in front: "ohwx dog, a puppy on a sofa". One that has the token
    already stays as it is. Braces, which would be read as placeholders, become brackets.
    """
    text = " ".join(caption.replace("{", "(").replace("}", ")").split())
    if holds(text, token):
        return text
    if class_word:
        # No part of a longer word: "dog-shaped" and "hotdogs" do not name a dog
        mention = re.search(rf"(?<![\w-]){re.escape(class_word)}(?![\w-])", text, re.IGNORECASE)
        if mention:
            return f"{text[: mention.start()]}{token} {text[mention.start() :]}"
    subject = f"{token} {class_word}" if class_word else token
    return f"{subject}, {text}" if text else subject
