"""Block `closed`: a model behind a service, which tunes it, answers, writes queries or judges."""

from typing import Any, Literal

from pydantic import Field

from pi_ray.config.block import Amount, Block, Count, check_plain_url, doc, omit_default, refuse


class ClosedConfig(Block):
    """A closed model, fine-tuned and asked through OpenAI's API or one like it, for train.backend.name: openai."""

    base_url: str = doc("", "URL of the service's API; empty: OpenAI's own")
    jobs: Literal["openai", "together"] = omit_default("openai", "whose API fine-tuning jobs are created by: OpenAI's, "
        "as Azure has it too, or Together AI's")
    model: str = doc("gpt-4o-mini-2024-07-18", "the service's name of the base model")
    api_key_env: str = doc("OPENAI_API_KEY", "environment variable with the service's key")
    batch_size: Count = doc(0, "0: the service's choice")
    lr_multiplier: Amount = doc(0.0, "factor on the service's learning rate; 0: the service's choice")
    lr: Amount = omit_default(0.0, "learning rate itself, which jobs of together take; 0: the service's choice")
    suffix: str = Field("pi-ray", pattern=r"^[a-z0-9-]{1,40}$", description="part of the tuned models' names")
    train_price: Amount = doc(3.00, "per million training tokens, as your service has it now")
    input_price: Amount = doc(0.30, "per million input tokens of evaluation")
    output_price: Amount = doc(1.20, "per million output tokens of evaluation")
    confirmed: bool = doc(False, "spend without asking; needed where nobody can be asked")
    poll_s: Amount = doc(10.0, "seconds between looks at a job; up to six times that while nothing happens")

    def model_post_init(self, context: Any) -> None:
        check_plain_url(self.base_url, "closed.base_url")
        together = self.jobs == "together"
        refuse(together and not self.base_url,
            "closed.jobs together: give its address, closed.base_url: https://api.together.xyz/v1")
        refuse(self.lr_multiplier if together else self.lr,
            f"closed.{'lr_multiplier' if together else 'lr'} is not for closed.jobs {self.jobs}; "
            f"take closed.{'lr' if together else 'lr_multiplier'}")
