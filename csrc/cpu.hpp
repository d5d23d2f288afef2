// Which instruction sets this build holds, which this machine has, and which one is in use.
#pragma once
#include <string>
#include <vector>

#include "matrix_units.h"
#include "table.h"

namespace fusedopt {

struct Level {
  const char* name;
  const Table* table;
  bool (*supported)();
};

// Lowest first; only those that the machine supports.
const std::vector<Level>& levels();

// The level in use: the highest, until `force_level` says otherwise.
const Level& level();
bool force_level(const std::string& name);

// The instructions for products of bfloat16 that this build and machine have, the fastest first.
// The first call asks the operating system for the tiles of AMX.
const std::vector<const MatrixUnits*>& matrix_units();

}  // namespace fusedopt
