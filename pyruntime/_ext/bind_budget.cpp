// The byte budget: a ledger shared by arenas and caches, with Python callables as reclaim
// callbacks.
#include "budget.hpp"
#include "native.hpp"

namespace pyruntime::bindings {
namespace {

class BudgetClient {
 public:
  BudgetClient(std::shared_ptr<Budget> budget, const std::string& name, int32_t priority,
               py::object reclaim)
      : budget_(std::move(budget)), reclaim_(new py::object(std::move(reclaim))) {
    check(pyrt_budget_register(budget_->handle(), name.c_str(), priority,
                               reclaim_->is_none() ? nullptr : &run_reclaim, reclaim_.get(),
                               &client_));
  }
  ~BudgetClient() {
    py::gil_scoped_release release;  // a running callback needs it
    // Refused inside its own callback and in a forked child: then the client stays, and what it
    // calls must stay too.
    if (pyrt_budget_unregister(client_, 1) != PYRT_OK) (void)reclaim_.release();
  }
  BudgetClient(const BudgetClient&) = delete;
  BudgetClient& operator=(const BudgetClient&) = delete;

  void unregister(bool force) {
    call([&] { return pyrt_budget_unregister(client_, force); });
    client_ = nullptr;
  }
  bool registered() const { return client_ != nullptr; }
  void reserve(uint64_t bytes) {
    call([&] { return pyrt_budget_reserve(client_, bytes); });
  }
  void give_back(uint64_t bytes) {
    call([&] { return pyrt_budget_give_back(client_, bytes); });
  }

  py::dict statistics() const {
    pyrt_budget_client_statistics s;
    s.struct_size = sizeof s;
    call([&] { return pyrt_budget_client_get_statistics(client_, &s); });
    using namespace py::literals;
    return py::dict("priority"_a = s.priority, "reserved_bytes"_a = s.reserved_bytes,
                    "peak_bytes"_a = s.peak_bytes, "reserves"_a = s.reserves,
                    "failures"_a = s.failures, "asked"_a = s.asked, "asked_bytes"_a = s.asked_bytes,
                    "freed_bytes"_a = s.freed_bytes);
  }

 private:
  std::shared_ptr<Budget> budget_;
  std::unique_ptr<py::object> reclaim_;
  pyrt_budget_client* client_ = nullptr;
};

}  // namespace

void bind_budget(py::module_& m) {
  py::class_<Budget, std::shared_ptr<Budget>>(m, "Budget")
      .def(py::init<uint64_t>(), py::arg("limit_bytes"))
      .def_property_readonly("address", &Budget::address)
      .def("statistics", &Budget::statistics);
  py::class_<BudgetClient>(m, "BudgetClient")
      .def(py::init<std::shared_ptr<Budget>, const std::string&, int32_t, py::object>(),
           py::arg("budget"), py::arg("name"), py::arg("priority"), py::arg("reclaim"))
      .def_property_readonly("registered", &BudgetClient::registered)
      .def("unregister", &BudgetClient::unregister, py::arg("force"))
      .def("reserve", &BudgetClient::reserve, py::arg("bytes"))
      .def("give_back", &BudgetClient::give_back, py::arg("bytes"))
      .def("statistics", &BudgetClient::statistics);
  m.attr("BUDGET_UNIT_BYTES") = static_cast<uint64_t>(PYRT_BUDGET_UNIT_BYTES);
}

}  // namespace pyruntime::bindings
