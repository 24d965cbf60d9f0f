def compact_segments(keep, key, value, positions, starts, out_keys, out_values, out_positions):
    rank = keep.cumsum(-1) - 1
    place = (starts[..., None] + rank)[keep]
    out_keys[place] = key[keep]
    out_values[place] = value[keep]
    out_positions[place] = positions[keep].to(out_positions.dtype)
