// The script's grammar. Pure text.
#include <cstdlib>
#include <stdexcept>

#include "worker.h"

namespace worker {

std::vector<std::string> split_list(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t start = 0;
  for (size_t at = 0; at <= text.size(); ++at) {
    if (at < text.size() && text[at] != separator) continue;
    if (at > start) parts.push_back(text.substr(start, at - start));
    start = at + 1;
  }
  return parts;
}

std::string Statement::text(const std::string& key, const std::string& otherwise) const {
  auto found = args.find(key);
  return found == args.end() ? otherwise : found->second;
}

long Statement::number(const std::string& key, long otherwise) const {
  auto found = args.find(key);
  if (found == args.end()) return otherwise;
  char* end = nullptr;
  long value = strtol(found->second.c_str(), &end, 0);
  if (*end == 'k' || *end == 'K') value <<= 10, ++end;
  if (*end == 'm' || *end == 'M') value <<= 20, ++end;
  if (end == found->second.c_str() || *end) throw std::runtime_error(name + ": " + key + " is no number");
  return value;
}

bool Statement::concerns(int rank) const {
  if (!has("on")) return true;
  for (const std::string& part : split_list(text("on", ""), ',')) {
    if (atoi(part.c_str()) == rank) return true;
  }
  return false;
}

std::vector<Statement> parse(const std::string& text) {
  std::vector<std::vector<Statement>> stack(1);
  std::vector<Statement> open;
  std::string clean = text;
  bool comment = false;
  for (char& c : clean) {
    if (c == '#') comment = true;
    if (c == '\n') comment = false;
    if (comment) c = ' ';
    if (c == ';') c = '\n';
    if (c == '\t' || c == '\r') c = ' ';
  }
  for (const std::string& line : split_list(clean, '\n')) {
    std::vector<std::string> words = split_list(line, ' ');
    if (words.empty()) continue;
    Statement s;
    s.name = words[0];
    for (size_t i = 1; i < words.size(); ++i) {
      size_t equals = words[i].find('=');
      if (equals == std::string::npos) {
        s.args[words[i]] = "1";
      } else {
        s.args[words[i].substr(0, equals)] = words[i].substr(equals + 1);
      }
    }
    if (s.name == "repeat") {
      open.push_back(s);
      stack.emplace_back();
    } else if (s.name == "end") {
      if (open.empty()) throw std::runtime_error("end without repeat");
      Statement loop = open.back();
      open.pop_back();
      loop.body = std::move(stack.back());
      stack.pop_back();
      stack.back().push_back(loop);
    } else {
      stack.back().push_back(s);
    }
  }
  if (!open.empty()) throw std::runtime_error("repeat without end");
  return stack[0];
}

}  // namespace worker
