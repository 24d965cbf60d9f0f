"""The LOOKAHEAD_KV member of PEFT's list of adapter types."""

from peft import PeftType

from lkq_hf.formats import PEFT_TYPE


def _peft_type(name: str) -> PeftType:
    """The member of ``PeftType`` with this name, which is added if PEFT does not have it.

    PEFT looks adapter types up in this enumeration and has no other way to extend it.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # What enum's metaclass does for a member in the class body.
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


LOOKAHEAD_KV = _peft_type(PEFT_TYPE)
