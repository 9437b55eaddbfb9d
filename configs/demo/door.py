"""The environment of door.yaml: a digit behind a door, which is shown to whoever asks for it."""


class Door:
    """Shows the picture of its record once it is asked to open, and rewards the right digit."""

    def reset(self, behind, answer, **record):
        self.behind, self.answer, self.is_open = behind, answer, False

    def step(self, said):
        if said.strip() == "Open." and not self.is_open:
            self.is_open = True
            return {"text": "Which digit is it?", "pictures": [self.behind]}
        return {"reward": float(said.strip() == self.answer), "done": True}
