"""Makes KPSVD a member of PEFT's closed enumeration of methods.

PEFT's register_peft_method refuses a name that PeftType does not list, and PeftType cannot be
subclassed because it has members. A plain string key in PEFT's tables half works: saving does,
load_adapter and the model status do not. So the member is added the way the enum module itself
does it at class creation. Tests run it on every supported Python.
"""

from __future__ import annotations

from peft.utils.peft_types import PeftType

NAME = "KPSVD"


def add_peft_type() -> bool:
    """Add PeftType.KPSVD; False where it was there already."""
    if NAME in PeftType.__members__:
        return False
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    # EnumType.__setattr__ refuses to assign members; type's does not.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    return True
