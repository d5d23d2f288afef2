#include "norms.hpp"

#include "cpu.hpp"
#include "programs.hpp"

namespace fusedopt {

void SquareSums::Pass::prepare() {
  const Operation& squares = operation_named(*level().table, "squares");
  static constexpr std::uint8_t ORDER[] = {0, 1};  // the sum, the input
  static constexpr float ONE = 1;
  leaves.resize(inputs.size());
  steps.resize(inputs.size());
  operands.resize(2 * inputs.size());
  partials.clear();
  for (std::size_t k = 0; k < inputs.size(); ++k) {
    const Measured& m = *inputs[k];
    Operand* const own = &operands[2 * k];
    put(own[0].role, Role::SUMS);
    put(own[1].role, m.input->role);
    put(own[1].data, m.input->data);
    put(own[1].aux, m.input->aux);
    put(own[1].decode, m.input->decode);
    put(own[1].bits, m.input->bits);
    Step& step = steps[k];
    put(step.run, squares.compute[m.compute].mode[PLAIN]);
    put(step.segment, squares.segment[m.compute]);
    put(step.scalars, m.compute == F32 ? static_cast<const void*>(&ONE) : &m.scale);
    put<const std::uint8_t*>(step.operands, ORDER);
    put(step.operand_count, 2);
    Leaf& leaf = leaves[k];
    put(leaf.elements, m.elements);
    put<const Operand*>(leaf.operands, own);
    put<const Step*>(leaf.steps, &step);
    put(leaf.operand_count, 2);
    put(leaf.step_count, 1);
    put(leaf.used, 3u);
    put(leaf.summed, 1u);
    put(leaf.rows, m.rows);
    partials.add(leaf, own);
  }
  partials.place();
}

void SquareSums::Pass::run(int threads, ThreadChoice* choice) {
  partials.begin();
  fusedopt::run(leaves, threads, nullptr, choice);
  for (std::size_t k = 0; k < inputs.size(); ++k) inputs[k]->sum = partials.total(k);
}

void SquareSums::take(std::vector<Measured>& inputs) {
  all_.inputs.clear();
  wide_ = false;
  for (Measured& m : inputs) {
    all_.inputs.push_back(&m);
    wide_ = wide_ || m.compute == F64;
  }
  all_.prepare();
}

void SquareSums::find(int threads, ThreadChoice* choice) {
  if (wide_)
    for (Measured* const m : all_.inputs) m->scale = 1;
  all_.run(threads, choice);
  if (!wide_) return;
  again_.inputs.clear();
  for (Measured* const m : all_.inputs) {
    if (m->compute != F64 || rescaling(m->sum) == 1) continue;
    m->scale = rescaling(m->sum);
    again_.inputs.push_back(m);
  }
  if (again_.inputs.empty()) return;
  again_.prepare();
  again_.run(threads, nullptr);
}

}  // namespace fusedopt
