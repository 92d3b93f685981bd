// Keys of a filter from the Arrow C data interface, without an Arrow library: arrays are only read.
#pragma once

#include "native.hpp"

namespace pyruntime::bindings {

// (kind, keys) of an array of strings, binaries or integers: its capsules "arrow_schema" and
// "arrow_array". What is malformed or of another type raises ValueError.
py::tuple arrow_array_keys(const pyrt_filter* filter, const py::capsule& schema,
                           const py::capsule& array);
// (kind, keys of each array) of a stream, "arrow_array_stream", which is read to its end.
py::tuple arrow_stream_keys(const pyrt_filter* filter, const py::capsule& stream);

}  // namespace pyruntime::bindings
