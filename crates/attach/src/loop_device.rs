//! Loop devices: takes a free one, sets it on a file, tunes it, sees whether it is free again.
