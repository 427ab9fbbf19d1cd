// Command gitops answers what Flux, Helm 4 and Argo CD make of objects: a list of questions as JSON on its standard input,
// a list of answers on its standard output. Flux and Helm compute a status with kstatus; Argo CD runs Lua scripts.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	luajson "layeh.com/gopher-json"
)

// A script runs no longer in Argo CD.
const timeout = time.Second

type question struct {
	Object json.RawMessage `json:"object"`
	// Lua of Argo CD; without one, the question is for kstatus.
	Script string `json:"script"`
	// Parameters of an action, which versions before 3.1 do not have.
	Parameters map[string]string `json:"parameters"`
}

type answer struct {
	Status  string          `json:"status,omitempty"`
	Message string          `json:"message,omitempty"`
	Value   json.RawMessage `json:"value,omitempty"`
	Error   string          `json:"error,omitempty"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	var questions []question
	if err := json.NewDecoder(os.Stdin).Decode(&questions); err != nil {
		return err
	}
	answers := make([]answer, 0, len(questions))
	for _, each := range questions {
		answers = append(answers, answered(each))
	}
	return json.NewEncoder(os.Stdout).Encode(answers)
}

func answered(asked question) answer {
	object := &unstructured.Unstructured{}
	if err := object.UnmarshalJSON(asked.Object); err != nil {
		return answer{Error: err.Error()}
	}
	if asked.Script == "" {
		result, err := status.Compute(object)
		if err != nil {
			return answer{Error: err.Error()}
		}
		return answer{Status: result.Status.String(), Message: result.Message}
	}
	value, err := returned(asked, object.Object)
	if err != nil {
		return answer{Error: err.Error()}
	}
	return answer{Value: value}
}

// returned runs a script as Argo CD does (util/lua/lua.go): no more than the libraries that every version of it opens, the
// object as the global obj, a second of time.
func returned(asked question, object map[string]any) (json.RawMessage, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	libraries := map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage,
		lua.BaseLibName: lua.OpenBase,
		lua.TabLibName:  lua.OpenTable,
	}
	for _, name := range []string{lua.LoadLibName, lua.BaseLibName, lua.TabLibName} {
		call := lua.P{Fn: state.NewFunction(libraries[name]), NRet: 0, Protect: true}
		if err := state.CallByParam(call, lua.LString(name)); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	state.SetContext(ctx)
	state.SetGlobal("obj", toLua(state, object))
	if asked.Parameters != nil {
		parameters := state.CreateTable(0, len(asked.Parameters))
		for name, value := range asked.Parameters {
			parameters.RawSetString(name, lua.LString(value))
		}
		state.SetGlobal("actionParams", parameters)
	}
	if err := state.DoString(asked.Script); err != nil {
		return nil, err
	}
	value := state.Get(-1)
	if value.Type() != lua.LTTable {
		return nil, fmt.Errorf("the script returns a %s, not a table", value.Type())
	}
	return luajson.Encode(value)
}

func toLua(state *lua.LState, value any) lua.LValue {
	switch typed := value.(type) {
	case bool:
		return lua.LBool(typed)
	case int64:
		return lua.LNumber(typed)
	case float64:
		return lua.LNumber(typed)
	case string:
		return lua.LString(typed)
	case []any:
		table := state.CreateTable(len(typed), 0)
		for _, item := range typed {
			table.Append(toLua(state, item))
		}
		return table
	case map[string]any:
		table := state.CreateTable(0, len(typed))
		for name, item := range typed {
			table.RawSetString(name, toLua(state, item))
		}
		return table
	}
	return lua.LNil
}
