// Fault rules of TWOSHOT_SIM_FAULTS: `;`-separated
//   [rank=R,]call=NAME,nth=K,<code=N | block | delay=MS | stop=MS | kill>[,sticky]
// NAME is an exported entry, with or without its version suffix; nth=0 means
// every use, K the K-th use by this process. `stop` stops the whole
// process for so long, as a debugger does. `sticky` makes every later call of
// this process return the same code, as a poisoned context does.
//
// TWOSHOT_SIM_CALLER names a library: rules then concern its calls alone, not
// those of the program or of libnccl, and the statistics count them apart, as
// `own.NAME`.
#pragma once

namespace twoshot::sim::faults {

bool any();                          // false: no rule can match in this process
bool filtered();                     // TWOSHOT_SIM_CALLER is set
bool concerns(const void* caller);   // code at this address is what the rules are about
int apply(const char* name);         // blocks, delays, kills, or returns a code; 0: go on
int sticky();                        // the code that poisons this process, or 0
bool watches(const char* name);      // some rule names this entry

}  // namespace twoshot::sim::faults
