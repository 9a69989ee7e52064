"""KPSVD as a PEFT method: importing this package registers it with PEFT."""

from peft.utils import register_peft_method

from kpsvd_tune.adapter.config import KpsvdConfig
from kpsvd_tune.adapter.layer import KpsvdLayer, KpsvdLinear
from kpsvd_tune.adapter.model import KpsvdModel, load_factors
from kpsvd_tune.adapter.registration import add_peft_type

__all__ = ["KpsvdConfig", "KpsvdLayer", "KpsvdLinear", "KpsvdModel", "load_factors"]

if add_peft_type():
    register_peft_method(name="kpsvd", config_cls=KpsvdConfig, model_cls=KpsvdModel)
